"""What a run reports: validation images, luminance, its model card, and pushing to the Hub."""
