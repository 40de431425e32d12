"""What tests share: small models and tokenizers, runs, batches, and paths of the repository."""
