"""The score or logit that does not count: exp of its distance to any that does is 0 in float32.

It is not -inf, and not the lowest number, for NeuronCores: there a transpose on the matrix unit
makes NaN of inf, and exp gives NaN near the lowest numbers.  Sources: AWS Neuron, neuronx-cc's
option --enable-saturate-infinity; optimum-neuron 0.4.5, ``scaled_qk`` in its attention_base.py.
"""

from __future__ import annotations

HIDDEN = -1e9
