"""Retrain Stable Diffusion with v-loss on a zero-terminal-SNR schedule.

    accelerate launch examples/finetune_stable_diffusion.py --config examples/configs/sd21.yaml --train_data_dir photos

The same as `accelerate launch -m zsnr_diffusers.training`; see `--help` for every option. To change what is trained or
how, start from `minimal_finetune.py`, the method on one screen, or from `zsnr_diffusers/training/trainer.py`.
"""

from zsnr_diffusers.training import main

if __name__ == "__main__":
    main()
