"""Adaptations: each edits the list of layer specs before it is built. What they train is said by plan.adaptation.

Shapes in this package: those of lmscale.models, and r rank, m width of a bottleneck, p keys of a prefix, k vectors of a
prompt, N adaptations side by side.
"""
