"""Small skills that a newcomer understands at a glance, and one LoRA expert for each of them."""
