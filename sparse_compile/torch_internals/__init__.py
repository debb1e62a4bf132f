"""Every private name of PyTorch that the package uses is in these files; no other file uses one.

``private_names.self_test`` lists them, and says which of them the installed PyTorch lacks.

The launcher imports some of these files while PyTorch is being imported.  So none of them imports ``torch._dynamo``,
``torch._inductor`` or ``torch._functorch`` at its top, only within functions.
"""
