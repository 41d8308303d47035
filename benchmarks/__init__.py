"""Speed side by side with what a user would otherwise do, as ratios: `python -m benchmarks --list`.

Times in seconds say more about a machine than about the code, so every limit is one of a ratio. The library
does not import this package.
"""
