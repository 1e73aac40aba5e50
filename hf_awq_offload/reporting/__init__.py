"""`report_dir`: what a run did, as JSON for programs and as a page with pictures for people. See docs/report.md."""
