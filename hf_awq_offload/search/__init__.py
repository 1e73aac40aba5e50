"""Pure searches on (weight, statistics): scales, clipping ranges. No module, no model, no file is seen here."""
