"""Two small trained language models, how they were trained and what they are measured on."""
