"""What conversions learn from text before they run: importance matrices."""
