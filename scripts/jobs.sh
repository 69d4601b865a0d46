#!/usr/bin/env bash
# Prints the study as one command per line, for sweep.sh and sweep.slurm:
#   bash scripts/jobs.sh                                  the whole paper, 880 runs: seed 1 of everything first
#   bash scripts/jobs.sh --figure 5a --seeds 1,2          what a figure needs: 1 4 5a 5b 6 7 8 10 11 13 14 15 16 17
#   bash scripts/jobs.sh --algorithms ppo --games Pong,Breakout --activations relu,tanh-lan
#   bash scripts/jobs.sh --runs-dir DIR -- FLAGS          DIR and FLAGS are passed on to every run
# Lists are comma-separated, and runs come in their order. A relative DIR starts at the project's folder.
set -efuo pipefail  # -f: a list is never a file pattern

all_algorithms=dqn,ppo
all_games=BeamRider,Breakout,Enduro,Pong,Qbert,Seaquest,SpaceInvaders,VideoPinball
all_activations=relu,tanh,sigmoid,selu,tanh-lan,tanh-2xlan,tanh-addlan,layernorm,wide-1024,relu-lan,sigmoid-lan
main_activations=relu,tanh,sigmoid,tanh-lan

fail() {
    echo "error: $*" >&2
    exit 2
}

# check NAME LIST VALID: every item of the list is one of the valid ones
check() {
    local item
    [[ -n $2 && $2 != *, ]] || fail "$1 is an empty list or ends in a comma; it takes some of $3"
    [[ $2 != *[[:space:]]* ]] || fail "$1 '$2' has a space; it takes some of $3, with commas between"
    for item in ${2//,/ }; do
        [[ ,$3, == *",$item,"* ]] || fail "$1 $item: there is no such one; it takes some of $3"
    done
}

# common A B: the items of A that B has too, in A's order
common() {
    local item found=
    for item in ${1//,/ }; do
        [[ ,$2, != *",$item,"* ]] || found+=,$item
    done
    echo "${found#,}"
}

# quoted WORD: so that any shell, and Python's shlex, read it back
quoted() {
    if [[ $1 =~ ^[a-zA-Z0-9_./=:,@%+-]+$ ]]; then
        echo "$1"
    else
        echo "'${1//\'/\'\\\'\'}'"
    fi
}

algorithms=$all_algorithms games=$all_games activations=$all_activations seeds= figure=
passed_on=()
while (($#)); do
    case $1 in
        --algorithms | --games | --activations | --seeds | --figure | --runs-dir)
            (($# > 1)) || fail "$1 needs a value"
            ;;&
        --algorithms) check "$1" "$2" "$all_algorithms" && algorithms=$2 ;;
        --games) check "$1" "$2" "$all_games" && games=$2 ;;
        --activations) check "$1" "$2" "$all_activations" && activations=$2 ;;
        --seeds)
            [[ $2 =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "--seeds $2: it takes whole numbers, e.g. 1,2,3,4,5"
            seeds=$2
            ;;
        --figure)
            check "$1" "$2" 1,4,5a,5b,6,7,8,10,11,13,14,15,16,17
            [[ $2 != *,* ]] || fail "--figure $2: one figure at a time"
            figure=$2
            ;;
        --runs-dir) passed_on+=(--runs-dir "$2") ;;
        --help | -h)
            sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
            exit
            ;;
        --)
            shift
            for word; do
                case ${word//_/-} in
                    --env-id | --env-id=* | --activation | --activation=* | --seed | --seed=*)
                        fail "$word is set by each line; choose with --games, --activations and --seeds"
                        ;;
                esac
            done
            passed_on+=("$@")
            break
            ;;
        *) fail "unknown flag $1; try --help (what is meant for the runs goes behind --)" ;;
    esac
    shift 2
done

if [[ -n $figure ]]; then
    needed_algorithms=dqn needed_games=$all_games needed_activations=$main_activations
    case $figure in
        1) needed_activations=relu,tanh ;;
        5b) needed_activations=relu,tanh,tanh-lan,layernorm,wide-1024 ;;
        7) needed_activations=relu,selu,tanh-lan,tanh-addlan,tanh-2xlan ;;
        8 | 17) needed_algorithms=ppo ;;
        13) needed_activations=relu,relu-lan,sigmoid,sigmoid-lan,tanh,tanh-lan ;;
        14) needed_activations=relu,relu-lan ;;
        # The neurons of one trained network each: no baseline, no more than one seed
        4 | 10) needed_games=Breakout needed_activations=tanh,tanh-lan seeds=${seeds:-1} ;;
        11) needed_games=Breakout needed_activations=tanh,tanh-lan,sigmoid,sigmoid-lan seeds=${seeds:-1} ;;
    esac
    algorithms=$(common "$algorithms" "$needed_algorithms")
    games=$(common "$games" "$needed_games")
    activations=$(common "$activations" "$needed_activations")
    [[ -n $algorithms && -n $games && -n $activations ]] ||
        fail "figure $figure needs none of these runs, only $needed_algorithms, $needed_games, $needed_activations"
fi
seeds=${seeds:-1,2,3,4,5}

tail=
for word in ${passed_on[@]+"${passed_on[@]}"}; do
    tail+=" $(quoted "$word")"
done
for seed in ${seeds//,/ }; do
    for algorithm in ${algorithms//,/ }; do
        for game in ${games//,/ }; do
            for activation in ${activations//,/ }; do
                echo "python ${algorithm}_atari_lan.py --env-id ${game}NoFrameskip-v4" \
                    "--activation $activation --seed $seed$tail"
            done
        done
    done
done
