"""How a weight is projected: one file for each way, and in it all that its linears, its state and its cost need.

``base.Projection`` says what a projection is.  Its kernel lies in ``kernels/weight``, its definition in
``kernels/reference``; a recipe names it.
"""
