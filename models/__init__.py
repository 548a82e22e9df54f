"""What turns token ids into logits: embedding, block, encoder, pooling, heads, and the attention slot."""
