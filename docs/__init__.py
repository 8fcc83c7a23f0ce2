"""The book: chapters, exercises, and what draws and writes them."""
