"""LoRA adapters: new ones, trained ones, and their fused computation."""
