"""The language model: the only folder that imports llama_cpp.

`scheduler.Engine` is what the rest of the package uses. Importing this package loads no native library.
"""
