"""What kvcore is compared with: a module per family, and peers with environments of their own."""
