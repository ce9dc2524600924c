"""What the demo adapter is trained on, and how; see ``scripts/train_demo_adapter.py``."""
