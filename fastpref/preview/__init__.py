"""What a run would train on."""
