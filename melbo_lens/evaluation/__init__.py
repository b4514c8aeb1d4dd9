"""Is it more than chance?"""
