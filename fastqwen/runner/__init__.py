"""From a scheduled batch to sampled tokens: packing, the model, the sampler, the device."""
