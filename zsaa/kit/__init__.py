"""The reproducibility kit: the paper's numbers, result files, and the tables, figures and report made of them; and what
run_all.sh needs before torch is there (files, energy, the runner). Nothing in this very file imports anything, so that
it answers at once."""
