"""An ablation study: configs x seeds, trained, scored and compared in one table."""
