"""What watches a run. Without those that measure, the trainer trains as before; `branch_moments` steers its optimizer."""
