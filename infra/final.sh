#!/usr/bin/env bash
# Run a command whose platform starts it again when it fails. What another try cannot mend (a config, an input, a loss
# above its budget, somebody else at work, a budget used up: exit codes 2, 3, 4 and 6) ends as done, with the sentence
# that the command has said: else one mistyped word would take a cluster for each try.
set -uo pipefail
child=''
caught=''
pass_on() {
    caught=$1
    [[ -z $child ]] || kill "-$1" "$child"
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT
"$@" &
child=$!
[[ -z $caught ]] || kill "-$caught" "$child" # it came before there was a child
code=0
caught=again
while [[ -n $caught ]]; do # a signal ends a wait, too
    caught=''
    wait "$child"
    code=$?
done
case $code in
    2 | 3 | 4 | 6)
        echo "ended with code $code, which another try cannot mend: not started again" >&2
        exit 0
        ;;
esac
exit "$code"
