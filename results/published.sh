#!/usr/bin/env bash
# The CIFAR-10 row of the paper on one CUDA GPU: three teachers from scratch, then the five pairs.
#
#     bash results/published.sh
#
# Run it again after any stop: finished teachers are kept, unfinished ones and all pairs resume. The
# last lines are the table, drawn from what is there. Settings from the environment:
#     DATA="--dataset folder --data-root data/cifar10_jpeg"   other images (default --dataset cifar10)
#     TRAIN="--image-size 32" FLAGS="--epochs 300 --compile"  more flags for train.py and nayer.py
#     PAIRS="wrn40_2:wrn16_2"                                 fewer pairs
#     OUT=runs/published                                      where everything goes
set -euo pipefail
cd "$(dirname "$0")/.."
data=${DATA:---dataset cifar10}
out=${OUT:-runs/published}
pairs=${PAIRS:-resnet34:resnet18 vgg11:resnet18 wrn40_2:wrn16_1 wrn40_2:wrn40_1 wrn40_2:wrn16_2}
for pair in $pairs; do
    teacher=$out/${pair%:*}.safetensors
    if [ ! -e "$teacher" ]; then
        python teachers/train.py $data --model "${pair%:*}" --out "$teacher" --resume ${TRAIN:-}
    fi
    python nayer.py $data --teacher "$teacher" --student "${pair#*:}" --out "$out/${pair/:/-}" \
        --resume ${FLAGS:-}
done
python results/figures.py published "$out" $pairs
