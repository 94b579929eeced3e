"""What features, catalogs, comparisons and sweeps show of themselves: HTML in a notebook, coloured text in a terminal.

colours ─▶ html · svg · terminal ─▶ feature ─▶ catalog
                                 ─▶ comparison · sweep · reading
"""
