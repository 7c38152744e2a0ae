"""Importing this module, before torch, makes waiting threads go to sleep after a fraction of a millisecond.

A training step of a small model has several hundred parallel loops. GNU's OpenMP spins for milliseconds at the end
of each before it sleeps; as soon as another program uses a core too, every loop waits for a time slice, and a step
takes many times longer. A short spin costs an idle machine next to nothing, no spin at all about two fifths. OpenMP
reads its environment once, when torch is loaded. What the user has set stays.
"""

from __future__ import annotations

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
