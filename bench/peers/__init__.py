"""What kvcore is compared with, one module per family."""
