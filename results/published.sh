#!/usr/bin/env bash
set -euo pipefail
help='The CIFAR-10 row of the paper on one CUDA GPU: teachers from scratch, then the pairs, then the table.

    bash results/published.sh
    bash results/published.sh --pairs "wrn40_2:wrn16_2" --epochs 300 --seeds "0 1 2" -- --no-amp

--pairs "T:S ..."  teachers and students (default: the five of the paper)
--epochs E         after the warm-up (default: 100)
--seeds "K ..."    a run of each pair for each (default: 0)
--teacher FILE     a model file, the T of all pairs: none is trained
--data "FLAGS"     of train.py and nayer.py (default: --dataset cifar10)
--train "FLAGS"    more flags of train.py
--out FOLDER       (default: runs/published)
-- FLAGS           more flags of nayer.py

After a stop, the same command goes on: a teacher that is there is not trained again, runs resume.'

refuse() {
    echo "published.sh: error: $1" >&2
    exit 2
}

pairs="resnet34:resnet18 vgg11:resnet18 wrn40_2:wrn16_1 wrn40_2:wrn40_1 wrn40_2:wrn16_2"
epochs=100
seeds=0
teacher=
data="--dataset cifar10"
train=
out=runs/published
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) echo "$help" && exit ;;
        --) shift && break ;;
    esac
    [ $# -gt 1 ] || refuse "$1 needs a value; see --help"
    case $1 in
        --pairs) pairs=$2 ;;
        --epochs) epochs=$2 ;;
        --seeds) seeds=$2 ;;
        --teacher) teacher=$2 ;;
        --data) data=$2 ;;
        --train) train=$2 ;;
        --out) out=$2 ;;
        *) refuse "there is no $1; see --help" ;;
    esac
    shift 2
done
for pair in $pairs; do
    [[ $pair == ?*:?* ]] || refuse "--pairs: $pair is not T:S"
done
[ -z "$teacher" ] || [ -e "$teacher" ] || refuse "--teacher: there is no $teacher"

root=$(dirname "$0")/..
groups=()
for pair in $pairs; do
    name=${pair%%:*}
    student=${pair#*:}
    file=${teacher:-$out/$name.safetensors}
    if [ ! -e "$file" ]; then
        python "$root/teachers/train.py" $data --model "$name" --out "$file" --resume $train
    fi
    for seed in $seeds; do
        python "$root/nayer.py" $data --teacher "$file" --student "$student" --epochs "$epochs" \
            --seed "$seed" --out "$out/$name-$student/$seed" --resume "$@"
    done
    groups+=("$name to $student=$out/$name-$student/*")
done
python "$root/results/figures.py" compare "${groups[@]}"
