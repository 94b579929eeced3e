"""Steering: directions, the edits made from them, and generation with edits on.

directions · kinds · positions ─▶ edits ─▶ plan ─▶ steer · hooks ─▶ generate ─▶ compare ─▶ sweep · additions
                                  └─▶ files · gguf          judging · choosing ─┘
"""
