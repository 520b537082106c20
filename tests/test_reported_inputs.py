"""Inputs from public bug reports about trainers, engines and converters, and what happens to them here.

One test per report, named after the input; sections by kind. Inputs that benchmarks/fuzz.py found are in the
last section.
"""

from __future__ import annotations

# --- 1. checkpoints tell other programs everything the run used --------------------------------------------

# --- 2. no library or default silently replaces something --------------------------------------------------

# --- 3. thinking models ------------------------------------------------------------------------------------

# --- 4. tags, tokens and text ------------------------------------------------------------------------------

# --- 5. state outside the settings -------------------------------------------------------------------------

# --- 6. RoPE that depends on the length --------------------------------------------------------------------

# --- 7. data without a right answer ------------------------------------------------------------------------

# --- 8. contracts with user code ---------------------------------------------------------------------------

# --- 9. editors and YAML -----------------------------------------------------------------------------------

# --- 10. finite gradients ----------------------------------------------------------------------------------

# --- found by benchmarks/fuzz.py ---------------------------------------------------------------------------
