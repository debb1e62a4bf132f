"""The figures of README.md and docs/, by name, from benchmarks/results/*.json.

Each function of ``provenance``, ``steps``, ``losses``, ``kernels`` and ``code`` that returns text and has no underscore
may be named in a marker of a page (``render_docs.py``).  ``device`` is a part of a device's name, such as ``"H200"``.
What is asked for and is not in the results is a ``FigureError``, which lists what there is.
"""
