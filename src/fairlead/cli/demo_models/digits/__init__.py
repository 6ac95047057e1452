"""The small image model of `fairlead demo`: its folder `digits/`, the pictures it learned from, and their judge."""

from pathlib import Path

FOLDER = Path(__file__).parent / "digits"
MODEL = FOLDER / "1"
NUM_STEPS, GUIDANCE = 20, 3.0
"""That suit it; its model.yaml says so."""
