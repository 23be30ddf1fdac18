"""Runs the notebooks of a profile with papermill. This is what `./run_all.sh` starts.

`notebooks/profiles.yaml` says which notebooks a profile runs, and with which parameters:

    smoke:
      about: one line for --list
      jobs: 2                         # how many run at once, on as many cores; 1 if left out
      needs: [gpu]                    # what zsaa.needs knows; here for all notebooks, or below for one
      notebooks:
        00_quickstart:
          minutes: 3                  # measured; shown until this machine has a measurement of its own
          needs: ["model:openai-community/gpt2"]  # without it the notebook is not run
          wants: ["package:bitsandbytes"]         # without it parts of the notebook say "not run"
          alone: true                 # it shows times: nothing runs beside it
          parameters: {max_length: 256}

Everything generated goes to one folder, outputs/<profile>/ unless --output-dir names another:

    executed/NAME.ipynb           the executed notebook; exists only if the whole notebook ran
    executed/NAME.partial.ipynb   the same while it runs, and after a failure or interruption: to be read
    logs/NAME.log                 what the cells printed, with times and tracebacks
    done/NAME.json                written last: parameters, seconds, joules, files made, hashes of what made it
    timings/NAME.json             seconds of its last complete run, for --dry-run
    results/ figures/ tables/     written by the notebooks themselves, which get this folder as `output_dir`
    index.html                    written by zsaa.kit.report at the end of each run, after failures too

A notebook counts as done while its done-file matches the present notebook, zsaa source, parameters, lock
files and committed results, and all files that it made are still there. papermill's own output is never
asked: after a killed kernel it calls every cell completed. So a run that was stopped by anything, a power cut
included, goes on with the first notebook that is not done; and inside a notebook, each result file that was
written with zsaa.measure.cached is found again instead of measured again.

--shard k/n runs one of n disjoint parts. Shards may share an output folder (a network drive) at the same time, or
write to folders of their own: these are merged by copying them into one, and the report of the merged folder
(--report) shows all. No path is part of what makes a notebook done.

Only the standard library is imported at the top, so that --help, --list and --dry-run answer without an
installed package (--list and --dry-run need PyYAML); papermill is imported when a notebook is about to run, and torch
by kernels and by the process that writes the index page alone.

    plan.py         profiles.yaml, the notebooks' parameters, shards
    done.py         hashes and done-files
    folder.py       which output folder may be used, and its locks
    environment.py  what a kernel sees of the user's settings
    kernel.py       one notebook on its way through papermill
    notebook.py     its log, executed copy and done-file
    page.py         the index page, in a process of its own
    run.py          a profile's notebooks, one after the other or several at once
    beside.py       a process for each of those that run at once
    command.py      the command line
"""
