"""Steering: directions, the edits made from them, and generation with edits on.

directions · kinds ─▶ edits ─▶ positions ─▶ steer ─▶ compare ─▶ sweep
"""
