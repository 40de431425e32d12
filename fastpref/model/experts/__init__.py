"""Mixtures of experts whose weights lie in one tensor for all experts of a layer: 4 or 8 bits, and LoRA on them.

kinds.py says which modules these are, bits.py has the form of their weights, quantizer.py makes it while transformers
loads a model, and compute.py is their forward pass.
"""
