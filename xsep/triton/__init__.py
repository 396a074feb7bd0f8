"""The depthwise kernels in Triton, and what chooses and launches them.  ``xsep.ops.triton`` makes a backend of it.

``kernels`` is imported where Triton is there; ``configs`` and ``tuning`` need no Triton.
"""
