"""What tests share: small models and tokenizers, runs, batches, and the places of the repository."""
