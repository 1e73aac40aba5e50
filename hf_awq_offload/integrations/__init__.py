"""Other libraries' ways into the package, and the package's into theirs: PEFT and transformers' Trainer."""
