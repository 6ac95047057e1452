"""The engine on CUDA devices: kernels between the projections, captured steps, tokens chosen on the device."""
