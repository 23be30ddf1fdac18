"""Studies: a job says what is measured of which model, on which data, trained how; a module for each objective does it,
and writes one result file a seed. `python -m zsaa.run` is their command line."""
