"""Small skills that are easy to understand, and one LoRA expert for each of them."""
