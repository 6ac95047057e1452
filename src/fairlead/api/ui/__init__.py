"""The dashboard at /ui on the ops port."""
