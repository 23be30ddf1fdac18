"""What the kit needs before torch is there: files, energy, the runner. Nothing here imports a third-party package at
the top, so that run_all.sh answers at once."""
