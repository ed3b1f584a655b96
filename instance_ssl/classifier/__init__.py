"""The sharded instance classifier: plain tensors and a group in, tensors out."""
