"""LoRA and its relatives, embeddings and hypernetworks: how files spell them, which weights they change, and by which
formula.
"""
