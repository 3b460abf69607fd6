"""Evertune keeps one language model learning for years, and proves that nothing it could do was lost."""
