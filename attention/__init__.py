"""What happens between q, k, v and the mixed values: kernels, feature maps, projections, normalisers, fused ops."""
