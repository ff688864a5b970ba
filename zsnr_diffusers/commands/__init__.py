"""The commands of `zsnr`, a module each: `add_parser` says what a command takes, `run` does it.

Parsing imports no heavy library; what a command needs is imported once it runs.
"""
