"""Train a pixel-space network from scratch, by the recipe of DDPM or with v-prediction and zero terminal SNR.

    accelerate launch examples/train_unconditional.py --recipe cifar10-ddpm-zsnr --mixed_precision bf16 \\
        --dataset_name uoft-cs/cifar10 --image_column img --output_dir cifar10

The same as `accelerate launch -m zsnr_diffusers.training.pixels`; see `--help` for every option and recipe. With
`--class_column label` the network is told the classes.
"""

from zsnr_diffusers.training import PixelTrainingConfig, main

if __name__ == "__main__":
    main(kind=PixelTrainingConfig)
