"""Reports what a run does: progress while it works, then `report_dir` (JSON, a page, pictures). See docs/report.md."""
